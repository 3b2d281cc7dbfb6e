"""Looking at cells, models and this machine: explain, summary, environment, benchmark."""
