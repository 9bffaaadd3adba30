"""What an export of minutes says meanwhile: a line for each thing that may take long."""


def say(verb: str, what: str) -> None:
    """Print one line at once, for logs too."""
    print(f"{verb:<10} {what}", flush=True)
