"""What `app` is asked for."""

from dataclasses import dataclass

from ..clips.options import DEMO, ModelOptions
from ..option import option


@dataclass(frozen=True, kw_only=True)
class AppOptions(ModelOptions):
    """A model and where its page is served. Raises ValueError or TypeError for values out of range."""

    prompt: str | None = option("What stands in the prompt at first, for a model of your own.", None)
    fps: int | None = option("Frames a second.", None, least=1, unset="8 for demo, else 16")
    port: int = option("Of 127.0.0.1, which alone is listened to.", 7860)
    open: bool = option("Open the page in the browser.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port: got {self.port}; allowed: 1 to 65535.")
        if self.prompt is not None and self.model == DEMO:
            raise ValueError("prompt: got one for the demo model; allowed: with --model. Choose its words on the page.")
