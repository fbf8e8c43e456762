"""Command lines run in this process."""

from jaxldm import cli


def run(capsys, *words):
    """(exit code, stdout, stderr) of a command line."""
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def complaint(capsys, *words):
    """The one line on stderr of a command line that must fail with exit code 2."""
    code, _, err = run(capsys, *words)
    assert code == 2 and err.startswith("jaxldm: ") and err.count("\n") == 1 and "Traceback" not in err, (
        code,
        err,
    )
    return err
