"""The agent: carries data between datastores and a step's pod, in two containers beside the step's own.

It is all that is of ours in a pod, in an image of its own (``images/agent/Dockerfile``). What it has to do, and with
which rights, it reads from a file: the job document. It knows no Airflow, no Kubernetes and no metadata database.
"""
