"""One file or folder per stage; each has `run(config, workdir)`, and only stages and `main` see a ConfigDict."""
