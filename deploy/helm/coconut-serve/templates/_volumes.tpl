{{- define "coconut.volumes" -}}
{{- $v := .Values -}}
- name: config
  configMap: {name: {{ include "coconut.fullname" . }}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: cache
  emptyDir: {sizeLimit: {{ $v.cacheSize }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ $v.shmSize }}}
{{- if $v.model.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ $v.model.existingClaim }}}
{{- else if $v.model.claim.enabled }}
- name: models
  persistentVolumeClaim: {claimName: {{ include "coconut.fullname" . }}-models}
{{- else if $v.model.image }}
- name: models
  image: {reference: {{ $v.model.image }}, pullPolicy: IfNotPresent}
{{- else if include "coconut.hasModelVolume" . }}
- name: models
  emptyDir: {}
{{- end }}
{{- with $v.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Fetches weights before the start, once for a volume that stays. */}}
{{- define "coconut.downloader" -}}
{{- $v := .Values -}}
{{- $d := $v.model.download -}}
{{- if or $d.repository $d.command -}}
initContainers:
  - name: download
    image: {{ default (include "coconut.image" .) $d.image }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    {{- if $d.command }}
    command:
      {{- toYaml $d.command | nindent 6 }}
    {{- else }}
    command: [/bin/sh, -ec]
    args:
      - |
        into="/models/$(basename "$REPOSITORY")"
        # Pods that share the volume take turns; a second start finds the mark.
        exec 9>"$into.lock"
        python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
        [ -e "$into/.complete-$REVISION" ] && exit 0
        hf download "$REPOSITORY" --revision "$REVISION" --local-dir "$into"
        touch "$into/.complete-$REVISION"
    {{- end }}
    env:
      - {name: HOME, value: /tmp}
      - {name: HF_HOME, value: /tmp/huggingface}
      - {name: REPOSITORY, value: {{ $d.repository | quote }}}
      - {name: REVISION, value: {{ $d.revision | quote }}}
      {{- if $v.model.tokenSecret.name }}
      {{- include "coconut.tokenEnv" . | nindent 6 }}
      {{- end }}
    resources:
      {{- toYaml $v.resources | nindent 6 }}
    securityContext:
      {{- toYaml $v.securityContext | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end -}}
{{- end -}}

{{- define "coconut.placement" -}}
{{- $v := .Values -}}
topologySpreadConstraints:
  {{- if $v.topologySpreadConstraints }}
  {{- toYaml $v.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "coconut.selectorLabels" . | nindent 8 }}
  {{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $v $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
