"""What the command line does with networks and data, a file for each verb: a function of plain
arguments, which `jaxseg.main` calls. Training and evaluation are `jaxseg.train` and
`jaxseg.evaluate`; `regions.py` is train, eval and predict of a method that has no parameters.
"""
