"""Captions that the demo model is shown with."""

# Never trained on by name.
PROMPTS: tuple[str, ...] = (
    "a large red striped circle moving right over a blue checkered background",
    "a large yellow dotted star spinning clockwise over a purple marbled background, camera pans left",
    "a green solid triangle growing larger over a pink dotted background",
    "a white checkered square moving down over a red zigzag background, camera zooms in",
    "a cyan ringed diamond at the left standing still over an orange striped background, camera pans up",
    "a large black marbled cross spinning counterclockwise over a white shaded background",
    "an orange zigzag ring moving left over a green ringed background",
    "a pink shaded crescent at the top moving right over a blue marbled background, camera pans right",
    "a blue striped square moving up and a red solid circle moving down over a yellow dotted background",
    "a large white dotted circle growing smaller and a small black solid star spinning clockwise "
    "over a cyan striped background",
    "a purple ringed circle at the left moving right and a yellow solid triangle at the right moving left "
    "over a black checkered background",
    "a small red solid star at the top moving down and a large green striped ring at the bottom standing still "
    "over a purple shaded background, camera zooms out",
    "a yellow solid cross standing still and a white striped diamond growing larger over a green zigzag background, "
    "camera pans down",
    "a small pink solid circle moving right over a black ringed background",
)
