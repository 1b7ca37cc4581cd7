"""`rectified-spaattn app`: full, plain sparse and ours beside each other in a browser."""

from ..lab.app.blocks import serve
from ..lab.app.options import AppOptions
from ..lab.app.studio import studio
from ..lab.clips.options import ClipError
from ..lab.machine import device_of
from .console import plain_console
from .evaluate import usage_errors
from .options import loading


def run(options: AppOptions) -> None:
    """The whole command; it ends with Ctrl-C."""
    console = plain_console()
    with usage_errors(), loading():
        made = studio(options, device_of(options.device))
    console.print(f"http://127.0.0.1:{options.port}   Ctrl-C ends it.")
    try:
        serve(made, options)
    except OSError as error:
        raise ClipError(f"--port: {options.port} cannot be had: {error}. Use another one.") from error
