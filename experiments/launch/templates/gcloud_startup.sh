#!/bin/bash
# Runs as root on each machine of {{ settings.slices }} x {{ settings.topology }} whenever it boots; what restarts is systemd's to do.
set -euo pipefail
export HOME=/root

cat >/usr/local/sbin/{{ name }} <<'END_OF_FILE'
#!/bin/bash
exec {% for part in container %}{{ part }}{{ " \\\n  " if not loop.last }}{% endfor %}

END_OF_FILE
chmod +x /usr/local/sbin/{{ name }}

cat >/etc/systemd/system/{{ name }}.service <<'END_OF_FILE'
[Unit]
Description=lfm_jax: {{ name }}
Wants=network-online.target
After=network-online.target docker.service
Requires=docker.service
# Of crashes and interruptions together, so that what crashes at once ends.
StartLimitIntervalSec=1h
StartLimitBurst={{ settings.max_restarts + 1 }}

[Service]
ExecStartPre=-/usr/bin/docker rm --force {{ name }}
ExecStart=/usr/local/sbin/{{ name }}
Restart=on-failure
RestartSec=10
# It was asked to stop and has saved, or the other machines did not come.
RestartForceExitStatus={{ interrupted }}
# run.py was told something wrong, and would be again.
RestartPreventExitStatus={{ mistake }}
# As long as it takes to finish a step and to save.
TimeoutStopSec=300
END_OF_FILE

{% if registry %}
gcloud auth configure-docker {{ registry }} --quiet
{% endif %}
docker pull {{ settings.image }}
systemctl daemon-reload
systemctl restart --no-block {{ name }}.service
