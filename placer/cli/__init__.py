"""The command line: parse, call one stage, render. Nothing imports it."""
