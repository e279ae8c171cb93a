"""Stand-ins that let code written for other packages run on Octavo."""

import importlib
import sys

_MODULES = {
    "flash_attn": (
        "flash_attn",
        "flash_attn.flash_attn_interface",
        "flash_attn.bert_padding",
        "flash_attn.layers",
        "flash_attn.layers.rotary",
        "flash_attn.ops",
        "flash_attn.ops.triton",
        "flash_attn.ops.triton.rotary",
    ),
    "flash_attn_interface": ("flash_attn_interface",),
}


def install() -> None:
    """Make `import flash_attn` (flash-attn 2) and `import flash_attn_interface` (flash-attn 3) mean Octavo in this
    process, with the parts that callers import; anything else of theirs raises `ImportError`.

    One line before other imports: `import octavo.compat; octavo.compat.install()`. Calling it twice does nothing more.
    Raises `RuntimeError` when a real one is imported already: its names may be bound elsewhere by then.
    """
    ours = {name: importlib.import_module(f"octavo.compat.{name}") for names in _MODULES.values() for name in names}
    for package in _MODULES:
        present = sys.modules.get(package)
        if present is not None and present is not ours[package]:
            raise RuntimeError(
                f"{package} is imported already; call octavo.compat.install() before anything imports it"
            )
    sys.modules.update(ours)
