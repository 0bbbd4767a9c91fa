"""What both frameworks read from the environment once, when they are loaded: to be set before either is imported."""

import os
import warnings

QUIET = {"GLOG_minloglevel": "3", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false",
         "DATASETS_VERBOSITY": "error"}
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""torch asks for them where it allocates; read when it allocates first."""
SHORT_SPINS = {"GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "0"}
"""How long threads that wait for others spin, torch's (libgomp) and Paddle's (libiomp5). Where other programs ran
beside it, small nets took 5 times as long with the defaults.
"""
EXACT_ON_GPU = {"NVIDIA_TF32_OVERRIDE": "0", "FLAGS_cudnn_deterministic": "1", "FLAGS_embedding_deterministic": "1"}


def prepare() -> None:
    """Set what is not set already, and silence the warnings of libraries."""
    for name, value in (QUIET | HUGE_PAGES | SHORT_SPINS | EXACT_ON_GPU).items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
