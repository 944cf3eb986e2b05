"""``python -m kvtuner_search``."""

from kvtuner_search.cli.main import main

main()
