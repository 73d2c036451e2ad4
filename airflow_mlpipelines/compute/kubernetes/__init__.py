"""Steps as pods of a Kubernetes cluster.

What the provider's KubernetesPodOperator would do to a step, and what is done instead
(docs/decisions/kubernetes-pods.md has the reasons):

* It knows no files. Here the worker sends code, runtime package and inputs to the pod through the API
  server, and fetches outputs and run files, each with a digest that both sides agree on. So any image works,
  with nothing of ours in it, and no volume is shared.
* It names pods at random, and finds them again by labels. Here the pod is named after the step run, which all
  automatic retries share: the API server itself sees to it that there are never two.
* It puts secrets into the pod. Here they are in a Secret that belongs to the pod, and goes with it.
* It reads logs on from the last second. Here each line arrives once.

A worker stays with its pod for the first half minute; then a trigger waits (docs/decisions/kubernetes-deferral.md).
"""

from __future__ import annotations

from airflow_mlpipelines.compute.kubernetes.launcher import KubernetesLauncher

__all__ = ["KubernetesLauncher"]
