"""Configs: load, override, check, show, store. Built on fiddle; knows no particular experiment."""
