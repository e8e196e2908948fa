"""What all tests share: hypothesis without wall-clock deadlines, on machines of any speed."""

from hypothesis import settings

settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")

pytest_plugins = ["pytester"]
