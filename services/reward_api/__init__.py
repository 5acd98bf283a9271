"""The reward service's HTTP contract, in the order a request passes it; `services.reward_http` puts it together.

door ─▶ body ─▶ asks ─▶ pictures ─▶ (backend) ─▶ answer        refusals, document: what each of them may say
"""
