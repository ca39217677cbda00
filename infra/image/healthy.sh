#!/bin/bash
# Whether Ray lives in this container, for docker's HEALTHCHECK (pods have probes of their own): its raylet answers, and with --head the
# GCS too. A container in which no Ray was started is healthy: its job runs in this very process, and ends when it ends.
set -euo pipefail

answers() { # PORT PATH
    wget --tries 1 --timeout "${HEALTH_SECONDS:-8}" --quiet --output-document - "http://localhost:$1/$2" | grep --quiet success
}

if [[ ! -e "${RAY_TMPDIR:-/tmp}/ray/session_latest" ]]; then
    echo "no Ray was started here"
    exit 0
fi
answers "${RAY_AGENT_PORT:-52365}" api/local_raylet_healthz || { echo "the raylet does not answer"; exit 1; }
if [[ "${1:-}" == --head ]]; then
    answers "${RAY_DASHBOARD_PORT:-8265}" api/gcs_healthz || { echo "the GCS does not answer"; exit 1; }
fi
echo "Ray lives"
