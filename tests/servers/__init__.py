"""Real servers for the tests and the benchmarks: nothing here is a mock."""
