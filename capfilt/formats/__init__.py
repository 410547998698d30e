"""Formats of other tools' files: one file per format, in and out; how rows are stored here is `capfilt/tables`."""
