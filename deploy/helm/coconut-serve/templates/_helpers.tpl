{{- define "coconut.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "coconut.fullname" -}}
{{- $name := include "coconut.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "coconut.selectorLabels" -}}
app.kubernetes.io/name: {{ include "coconut.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "coconut.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "coconut.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "coconut.metadata" -}}
name: {{ include "coconut.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "coconut.labels" . | nindent 2 }}
{{- end -}}

{{- define "coconut.image" -}}
{{- $flavour := ternary "cuda" "cpu" .Values.gpu.enabled -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion $flavour) .Values.image.tag -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}
{{- end -}}

{{- define "coconut.serviceAccountName" -}}
{{- $own := ternary (include "coconut.fullname" .) "default" .Values.serviceAccount.create -}}
{{- default $own .Values.serviceAccount.name -}}
{{- end -}}

{{- define "coconut.workload" -}}
{{- if gt (int .Values.vllm.nodes) 1 -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "coconut.fullname" . }}
{{- end -}}

{{/* GPUs of one pod. */}}
{{- define "coconut.gpus" -}}
{{- $all := mul .Values.vllm.tensorParallelSize .Values.vllm.dataParallelSize -}}
{{- ternary (div $all .Values.vllm.nodes) 1 (eq .Values.engine "vllm") -}}
{{- end -}}

{{- define "coconut.keysSecret" -}}
{{- if .Values.auth.existingSecret -}}
{{- .Values.auth.existingSecret -}}
{{- else if .Values.auth.apiKeys -}}
{{- printf "%s-keys" (include "coconut.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "coconut.hasModelVolume" -}}
{{- $m := .Values.model -}}
{{- if or $m.existingClaim $m.claim.enabled $m.image $m.download.repository $m.download.command -}}
yes
{{- end -}}
{{- end -}}

{{/* Kubernetes kills the pod after this: preStop, draining, uvicorn's close, and some air. */}}
{{- define "coconut.graceSeconds" -}}
{{- add 5 (ceil .Values.drainSeconds) 15 -}}
{{- end -}}

{{- define "coconut.minReplicas" -}}
{{- ternary .Values.autoscaling.minReplicas .Values.replicas .Values.autoscaling.enabled -}}
{{- end -}}

{{/* Flags after "--", one a line. */}}
{{- define "coconut.vllmFlags" -}}
{{- if eq .Values.engine "vllm" }}
- "--tensor-parallel-size={{ .Values.vllm.tensorParallelSize }}"
{{- if gt (int .Values.vllm.dataParallelSize) 1 }}
- "--data-parallel-size={{ .Values.vllm.dataParallelSize }}"
{{- end }}
{{- if gt (int .Values.vllm.nodes) 1 }}
- "--distributed-executor-backend=ray"
{{- end }}
{{- range .Values.vllm.extraFlags }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Refuse what the schema cannot express. */}}
{{- define "coconut.check" -}}
{{- $v := .Values -}}
{{- if and (gt (int $v.vllm.nodes) 1) (ne $v.engine "vllm") -}}
{{- fail "vllm.nodes above 1 needs engine: vllm" -}}
{{- end -}}
{{- if and (eq $v.engine "vllm") (not $v.gpu.enabled) -}}
{{- fail "engine: vllm needs gpu.enabled: true" -}}
{{- end -}}
{{- if mod (mul $v.vllm.tensorParallelSize $v.vllm.dataParallelSize) $v.vllm.nodes -}}
{{- fail "vllm.tensorParallelSize x vllm.dataParallelSize must be a multiple of vllm.nodes" -}}
{{- end -}}
{{- if and (gt (int $v.vllm.nodes) 1) (gt (int $v.vllm.dataParallelSize) 1) -}}
{{- fail "vllm.nodes above 1 is for tensor parallelism: scale copies with replicas" -}}
{{- end -}}
{{- if and $v.auth.apiKeys $v.auth.existingSecret -}}
{{- fail "give auth.apiKeys or auth.existingSecret, not both" -}}
{{- end -}}
{{- if gt (len (compact (list $v.model.existingClaim $v.model.image (ternary "claim" "" $v.model.claim.enabled)))) 1 -}}
{{- fail "/models is one volume: give one of model.existingClaim, model.image and model.claim" -}}
{{- end -}}
{{- if and $v.model.image (or $v.model.download.repository $v.model.download.command) -}}
{{- fail "model.image cannot be written: model.download needs a claim or nothing" -}}
{{- end -}}
{{- range $kind, $at := dict "monitoring.coreos.com/v1/ServiceMonitor" $v.metrics.serviceMonitor.enabled "monitoring.coreos.com/v1/PrometheusRule" $v.metrics.prometheusRule.enabled "gateway.networking.k8s.io/v1/HTTPRoute" $v.httpRoute.enabled "keda.sh/v1alpha1/ScaledObject" (and $v.autoscaling.enabled (eq $v.autoscaling.kind "keda")) "leaderworkerset.x-k8s.io/v1/LeaderWorkerSet" (gt (int $v.vllm.nodes) 1) -}}
{{- if and $at (not ($.Capabilities.APIVersions.Has $kind)) (not ($.Capabilities.APIVersions.Has (dir $kind))) -}}
{{- fail (printf "the cluster has no %s; install its operator (helm template: --api-versions %s)" $kind (dir $kind)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
