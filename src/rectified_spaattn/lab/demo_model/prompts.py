"""Captions that the demo model is shown with."""

# Written by hand; a scene of training may happen to have the same.
PROMPTS: tuple[str, ...] = (
    "a red metal sphere rolls right in front of a blue striped cube, checkered floor",
    "a yellow striped cylinder spins, grey floor, camera orbits left",
    "a green matte cube bounces next to a purple glass sphere, sandy floor",
    "an orange checkered sphere rolls closer, checkered floor at sunset",
    "a blue metal sphere circles around a white striped cone, grey floor",
    "a cyan matte cone stands still next to a red checkered cube, checkered floor, camera orbits right",
    "a white checkered sphere hits a red matte cube, sandy floor",
    "a purple glass cube slides left in front of a yellow matte sphere and a green metal cone, grey floor",
    "a red checkered cylinder drops from above, checkered floor, camera moves in",
    "a green striped sphere comes in from the left, sandy floor at sunset",
    "a blue checkered cube leaves to the right behind an orange metal cone, grey floor",
    "a white metal sphere rolls away next to a purple striped cylinder, checkered floor at sunset, camera orbits left",
    "a yellow glass sphere bounces, checkered floor",
    "an orange striped cube spins next to a cyan metal sphere, sandy floor, camera moves out",
)
