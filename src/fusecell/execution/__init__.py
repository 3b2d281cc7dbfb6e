"""The seam between layers and runners: options, the runner in force, and the cache of calls."""
