"""The only place that names what gunicorn keeps to itself.

Each private or undocumented name of gunicorn that this package reads, writes or calls is a row in a
table here: `arbiter.NAMES` for the master, `workers.NAMES` for the worker classes. Every other file
uses the functions and classes of this package. `table.missing` compares a table with the gunicorn
that is installed.
"""
