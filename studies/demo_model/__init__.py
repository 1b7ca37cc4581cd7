"""A next demo model: small 3-D scenes of solids, a ray tracer, a network and its training. Not in the package yet."""
