"""Library messages are hidden, as they would break the live line."""

import logging
import warnings


def quiet_imports() -> None:
    """Hide what libraries say while they are imported: which of their kernels this machine can't load, and has no need of."""
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Turn off progress bars and informational warnings of diffusers and transformers; the hub's downloads keep theirs."""
    quiet_imports()
    import diffusers
    import transformers
    from huggingface_hub.utils import enable_progress_bars

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    enable_progress_bars()  # the line above turns these off too
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # of Kandinsky's norms, in bf16
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters in one sample are meant
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")  # nothing is merged in training
