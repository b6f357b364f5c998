"""Floor 2: what is on disk: tables, shards, run folders, locks, ledgers. No torch."""
