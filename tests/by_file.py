"""Which worker runs what: a file is of one, so that what it builds and imports is built and imported once."""

from xdist.scheduler import LoadScopeScheduling


class ByFile(LoadScopeScheduling):
    """Files in turn to whoever is free; ranks of two files would wait for each other's cores, and are of one worker."""

    def __init__(self, config, log):
        super().__init__(config, log)
        config.option.loadscopereorder = False  # the order is that of longest_first

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ranks" if "/distributed/" in file else file
