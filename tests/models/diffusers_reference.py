"""What comparisons with diffusers share: a folder of ours opened in silence, with the config of theirs."""

import diffusers


def opened_by_diffusers(theirs, folder, caplog, recwarn):
    """The model in a folder as diffusers opens it: nothing to warn of, to miss or to leave over, and every
    entry of the config as in `theirs`, a model of the same class.
    """
    diffusers.utils.logging.enable_propagation()
    opened, report = type(theirs).from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True)
    assert [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn] == []
    assert not any(report.values()), report
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert opened.config[key] == _listed(value), key
    return opened.eval()


def _listed(value):
    """Tuples as JSON has them."""
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
