"""The extras of the installation: the modules of each one, and the error of a command that lacks a module.

`pip install rs-gguf` is enough for commands that read and write files. The extra `run` adds the packages that
run and fit models, and `try` the ones of its page besides.
"""

from __future__ import annotations

EXTRAS = {
    "run": (
        "accelerate", "httpx", "llama_cpp", "matplotlib", "optuna", "pydantic", "pydantic_core",
        "pydantic_settings", "scipy", "sklearn", "tomli_w", "torch", "transformers",
    ),
    "try": ("gradio",),
}  # fmt: skip
"""Top-level modules that each extra installs."""


def missing_extra(error: ModuleNotFoundError) -> str:
    """Return the message for a module that is missing: it names the extra to install.

    Raises:
        ModuleNotFoundError: `error` itself, if no extra has the module. It is then a fault of the program.
    """
    module = str(error.name).partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return (
                f"the Python package {module} is not installed; this command needs the extra {extra!r}. "
                f"Run `pip install 'rs-gguf[{extra}]'`, or in a checkout `pip install '.[{extra}]'`."
            )
    raise error
