"""Options of `pytest benchmarks/`."""


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="benchmarks: every case, not only the quick ones")
