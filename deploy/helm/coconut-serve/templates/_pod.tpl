{{/* The pod of a server; .role is "" or, in a LeaderWorkerSet, leader or worker. */}}
{{- define "coconut.pod" -}}
{{- $ := .root -}}
{{- $v := $.Values -}}
metadata:
  labels:
    {{- include "coconut.selectorLabels" $ | nindent 4 }}
    app.kubernetes.io/component: {{ ternary "worker" "server" (eq .role "worker") }}
    {{- with $v.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include (print $.Template.BasePath "/configmap.yaml") $ | sha256sum }}
    checksum/secret: {{ include (print $.Template.BasePath "/secret.yaml") $ | sha256sum }}
    {{- with $v.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "coconut.serviceAccountName" $ }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "coconut.graceSeconds" $ }}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if and $v.gpu.enabled $v.gpu.runtimeClassName }}
  runtimeClassName: {{ $v.gpu.runtimeClassName }}
  {{- end }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  {{- include "coconut.placement" $ | nindent 2 }}
  {{- with include "coconut.downloader" $ }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: server
      image: {{ include "coconut.image" $ }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      {{- include "coconut.command" . | trim | nindent 6 }}
      env:
        {{- include "coconut.env" $ | nindent 8 }}
      {{- if ne .role "worker" }}
      ports:
        - {name: http, containerPort: 8000, protocol: TCP}
        - {name: metrics, containerPort: {{ $v.metrics.port }}, protocol: TCP}
      {{- include "coconut.probes" $ | nindent 6 }}
      {{- end }}
      resources:
        {{- include "coconut.resources" $ | nindent 8 }}
      securityContext:
        {{- toYaml $v.securityContext | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/coconut-serve, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: cache, mountPath: /cache}
        - {name: shm, mountPath: /dev/shm}
        {{- if include "coconut.hasModelVolume" $ }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- with $v.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "coconut.volumes" $ | nindent 4 }}
{{- end -}}

{{- define "coconut.command" -}}
{{- $ := .root -}}
{{- $v := $.Values -}}
{{- if eq .role "worker" -}}
command: [ray, start, "--address=$(LWS_LEADER_ADDRESS):6379", --block]
{{- else -}}
{{- if eq .role "leader" }}
# Ray's head first, then the server, which takes the signals and waits for all GPUs.
command: [/bin/sh, -ec, 'ray start --head --port=6379 && exec coconut-serve "$@"', sh]
{{- end }}
args:
  - serve
  - {{ $v.model.name | quote }}
  - --config=/etc/coconut-serve/config.yaml
  {{- range $v.extraArgs }}
  - {{ . | quote }}
  {{- end }}
  {{- with include "coconut.vllmFlags" $ }}
  - --
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "coconut.probes" -}}
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 2
  failureThreshold: {{ div (add (ceil .Values.startupSeconds) 1) 2 }}
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /ready, port: http}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
lifecycle:
  preStop:  # endpoints forget the pod before it refuses work
    exec: {command: [sleep, "5"]}
{{- end -}}

{{- define "coconut.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.enabled -}}
{{- $limits := default dict $resources.limits -}}
{{- $_ := set $limits .Values.gpu.resourceName (include "coconut.gpus" . | int) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "coconut.env" -}}
- {name: HOME, value: /tmp}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: COCONUT_CACHE, value: /cache/coconut}
- {name: HF_HOME, value: /cache/huggingface}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/torchinductor}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
{{- if not .Values.model.fromHub }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- if dig "requests" "cpu" "" .Values.resources }}
- name: OMP_NUM_THREADS
  valueFrom: {resourceFieldRef: {containerName: server, resource: requests.cpu}}
{{- end }}
{{- if eq .Values.engine "vllm" }}
- {name: COCONUT_VLLM, value: "1"}
- {name: VLLM_USE_V2_MODEL_RUNNER, value: "1"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- end }}
{{- with include "coconut.keysSecret" . }}
- name: COCONUT_API_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.auth.key }}}}
{{- end }}
{{- if and .Values.model.fromHub .Values.model.tokenSecret.name }}
{{ include "coconut.tokenEnv" . }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "coconut.tokenEnv" -}}
{{- with .Values.model.tokenSecret -}}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end -}}
{{- end -}}
