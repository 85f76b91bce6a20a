"""What is compiled and run for a GPU that is lent for minutes: `pack` here, `run.sh` there."""
