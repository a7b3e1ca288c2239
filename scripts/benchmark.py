"""Times a part of the project, alone or next to another program: `python scripts/benchmark.py SUBJECT --help`."""

from benchmarks import command

if __name__ == "__main__":
    command.command()
