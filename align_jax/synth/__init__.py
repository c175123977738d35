"""The preference-data factory: a model writes tasks, code and tests, its code is run, verdicts become pairs.

    seeds, filters, near, typecheck   documented functions     prompts, shots.md   what a model is asked
    decontaminate                     none of a benchmark      answers, checks     what it wrote, parsed
    instruct                          concepts and tasks       write               a stage in which a model writes
    respond, dimensions               responses, rewrites      stream, cluster     a stage of pure work, on many cores
    verify, faults                    verdicts                 pipeline            all stages, one command
    pairs                             preference pairs         validate, ground_truth, review   can labels be trusted?
"""
