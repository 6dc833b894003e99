"""Our libraries speak through us: their progress bars and hints would break the live line."""

import logging
import warnings


def quiet_libraries() -> None:
    """Turn off progress bars and informational warnings of diffusers, transformers and the hub client."""
    import diffusers
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    disable_progress_bars()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
