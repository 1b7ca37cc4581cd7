from hypothesis import settings

# The same examples everywhere and no time limit an example: CI machines are slow and shared.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")
