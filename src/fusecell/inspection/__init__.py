"""Reports about cells, models and this machine: explain, summary, environment, benchmark."""
