"""Stands in for soundfile, which SGLang imports at start and only uses for speech. For tests of text models only."""
