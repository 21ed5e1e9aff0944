#!/bin/bash
# Asks Cloud TPU for {{ settings.slices }} x {{ settings.topology }}, on which {{ startup }} then starts the run. To be run again after a preemption:
# it removes what is left of the request, and asks anew.
set -euo pipefail
cd "$(dirname "$0")"

at=({{ at }})
state=$(gcloud compute tpus queued-resources describe {{ name }} "${at[@]}" --format='value(state.state)' 2>/dev/null || true)
case "$state" in
'') ;;
SUSPENDED | FAILED) gcloud compute tpus queued-resources delete {{ name }} "${at[@]}" --force --quiet ;;
*)
  echo "{{ name }} is $state: there is nothing to do"
  exit 0
  ;;
esac
gcloud compute tpus queued-resources create {{ name }} "${at[@]}" \
  --accelerator-type={{ piece.accelerator_type }} \
  --runtime-version={{ runtime }} \
{% if settings.slices == 1 %}
  --node-id={{ name }} \
{% else %}
  --node-count={{ settings.slices }} --node-prefix={{ name }} \
{% endif %}
{% if settings.spot %}
  --spot \
{% endif %}
{% if settings.service_account %}
  --service-account={{ settings.service_account }} \
{% endif %}
  --scopes=https://www.googleapis.com/auth/cloud-platform \
  --metadata-from-file=startup-script={{ startup }}
