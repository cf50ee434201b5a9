"""Generated cases are the same in every run; `--hypothesis-profile=explore` draws new ones."""

from hypothesis import HealthCheck, Phase, settings

# A shrink compiles for minutes, a new shape takes as long as ten old ones.
COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
}
settings.register_profile("same", derandomize=True, **COMMON)
settings.register_profile("explore", print_blob=True, **COMMON)
settings.load_profile("same")
