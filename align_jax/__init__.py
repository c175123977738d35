"""align_jax: align code language models, from the pretrained or the instruct checkpoint, in JAX.

Read in data order:

    records   what lies on disk between stages       synth/    a model writes tasks, code and tests: preference pairs
    text      prompts and completions to tokens      data      records to packed rows
    attention which token sees which, a kernel each  flash     the kernels of a GPU
    model     the Transformer                        lora      adapters beside its matrices
    hf        Hugging Face weights in and out        logprob   log-probs without logits
    losses    sft, dpo, ipo, bonbon                  step      the sharded train step
    train     the trainer, top to bottom             fit       would it fit, compiled without a chip
    slots     the decode step                        decode    prompts through the slots
    engine    decode, or an endpoint                 sample    a file of prompts, answered
    sandbox   untrusted programs, under limits       jail/     the sandbox's other side
    score/    EvalPlus                               report/   statistics, tables, the page
    study     the whole grid, resumable

One alphabet of axes, in every einsum and every shape:
    B prompts   C completions (a pair: chosen 0, rejected 1)   R packed rows   P example slots in a row
    T query time   S key time   D model   N query heads   K key-value heads   G = N / K   H head dim
    F mlp   V vocabulary   L layers   r rank of an adapter
"""
