"""What can be run: one module per experiment, each with a `Config` dataclass and `main(config, workdir)`."""
