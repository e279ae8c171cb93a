"""Stand-ins that let code written for other packages run on Octavo."""

import importlib
import sys

_MODULES = ("", ".flash_attn_interface", ".bert_padding", ".layers", ".layers.rotary")


def install() -> None:
    """Make `import flash_attn` mean Octavo in this process, with the parts of flash-attn 2 that callers import.

    One line before other imports: `import octavo.compat; octavo.compat.install()`. Calling it twice does nothing more.
    Raises `RuntimeError` when the real flash_attn is imported already: its names may be bound elsewhere by then.
    """
    ours = {f"flash_attn{name}": importlib.import_module(f"octavo.compat.flash_attn{name}") for name in _MODULES}
    present = sys.modules.get("flash_attn")
    if present is not None and present is not ours["flash_attn"]:
        raise RuntimeError("flash_attn is imported already; call octavo.compat.install() before anything imports it")
    sys.modules.update(ours)
