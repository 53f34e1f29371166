{{- define "embedmesh.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full -}}
{{- $full = ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- end -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "embedmesh.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .modality }}
embedmesh.io/modality: {{ . }}
{{- end }}
{{- with .encoder }}
embedmesh.io/encoder: {{ . }}
{{- end }}
{{- end }}

{{- define "embedmesh.labels" -}}
{{ include "embedmesh.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "embedmesh.serviceAccount" -}}
{{- default (ternary (include "embedmesh.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- /* registry/repository@digest, or :tag */ -}}
{{- define "embedmesh.image" -}}
{{- $repository := .repository -}}
{{- with .root.Values.image.registry }}{{ $repository = printf "%s/%s" . $repository }}{{ end -}}
{{- if .digest -}}
{{ printf "%s@%s" $repository .digest }}
{{- else -}}
{{ printf "%s:%s" $repository (.tag | default .root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{- /* A setting's value as the commands read it: Helm holds numbers as floats and would write 1e+06. */ -}}
{{- define "embedmesh.number" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{- /* {a_b: 1, c: true, d: false} as --a-b=1 --c --no-d */ -}}
{{- define "embedmesh.flags" -}}
{{- range $name, $value := . }}
{{- $flag := replace "_" "-" $name }}
{{- if kindIs "bool" $value }}
- {{ ternary "--" "--no-" $value }}{{ $flag }}
{{- else if not (kindIs "invalid" $value) }}
- {{ printf "--%s=%s" $flag (include "embedmesh.number" $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What gateways and encoders are told of tracing. */ -}}
{{- define "embedmesh.tracingFlags" -}}
{{- if .Values.tracing.endpoint }}
- --tracing
- --trace-ratio={{ .Values.tracing.ratio }}
{{- end }}
{{- end }}
{{- define "embedmesh.tracingEnv" -}}
{{- with .Values.tracing.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . }}
{{- end }}
{{- end }}

{{- /* Whole cores of a container: its CPU limit, else its request, rounded up; 0 where neither is given. */ -}}
{{- define "embedmesh.cores" -}}
{{- $cpu := dig "limits" "cpu" (dig "requests" "cpu" "0" .) . | toString -}}
{{- if hasSuffix "m" $cpu -}}
{{- divf (trimSuffix "m" $cpu | float64) 1000 | ceil | int -}}
{{- else -}}
{{- $cpu | float64 | ceil | int -}}
{{- end -}}
{{- end }}

{{- define "embedmesh.ports" -}}
{{- get (dict "text" 50051 "image" 50052 "audio" 50053) . -}}
{{- end }}
{{- define "embedmesh.httpPorts" -}}
{{- get (dict "text" 9051 "image" 9052 "audio" 9053) . -}}
{{- end }}

{{- /* The encoders that run, each completed by encoderDefaults: a YAML map. */ -}}
{{- define "embedmesh.encoders" -}}
{{- $all := dict -}}
{{- range $name, $own := .Values.encoders -}}
{{- $encoder := mustMergeOverwrite (deepCopy $.Values.encoderDefaults) (default dict $own) -}}
{{- if $encoder.enabled -}}
{{- $_ := set $encoder "modality" (default $name $encoder.modality) -}}
{{- $_ := set $all $name $encoder -}}
{{- end -}}
{{- end -}}
{{ toYaml $all }}
{{- end }}

{{- define "embedmesh.target" -}}
{{- printf "dns:///%s-%s.%s.svc.%s.:%s" (include "embedmesh.fullname" .root) .modality .root.Release.Namespace .root.Values.clusterDomain (include "embedmesh.ports" .modality) -}}
{{- end }}

{{- define "embedmesh.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "embedmesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* What gateway and encoder pods have in common. */ -}}
{{- define "embedmesh.podCommon" -}}
serviceAccountName: {{ include "embedmesh.serviceAccount" .root }}
automountServiceAccountToken: false
# The variables that Kubernetes makes of Services begin like those of our settings, and unknown settings are refused.
enableServiceLinks: false
securityContext:
  {{- include "embedmesh.podSecurity" . | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.spreadOver }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "embedmesh.selector" $.labels | nindent 8 }}
  {{- end }}
{{- end }}
# Endpoints are told first (preStop), then calls in flight get their time.
terminationGracePeriodSeconds: {{ add 15 (dig "drain_seconds" 20 .pod.settings | ceil | int) }}
{{- end }}

{{- define "embedmesh.containerCommon" -}}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "embedmesh.containerSecurity" . | nindent 2 }}
lifecycle:
  preStop:
    exec:
      command: [sleep, "5"]
resources:
  {{- toYaml .resources | nindent 2 }}
{{- end }}

{{- /* A Secret as files, never by subPath, which would not follow its changes: dict name secret */ -}}
{{- define "embedmesh.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    defaultMode: 288 # 0440
    {{- with .items }}
    items:
      {{- range . }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
    {{- end }}
{{- end }}

{{- /* HorizontalPodAutoscaler or ScaledObject: dict root name labels pod queue (whether there is one) */ -}}
{{- define "embedmesh.autoscaling" -}}
{{- $scaling := .pod.autoscaling -}}
{{- if eq $scaling.kind "hpa" }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "embedmesh.labels" .labels | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ .name }}
  minReplicas: {{ $scaling.minReplicas }}
  maxReplicas: {{ $scaling.maxReplicas }}
  metrics:
    {{- if .queue }}
    - type: Pods
      pods:
        metric:
          name: embedmesh_queue_cost_units
        target:
          type: AverageValue
          averageValue: {{ include "embedmesh.number" $scaling.queueCostUnits | quote }}
    {{- end }}
    - type: Pods
      pods:
        metric:
          name: embedmesh_requests_in_flight
        target:
          type: AverageValue
          averageValue: {{ include "embedmesh.number" $scaling.requestsInFlight | quote }}
  {{- with $scaling.behavior }}
  behavior:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else if eq $scaling.kind "keda" }}
{{- $pods := printf "namespace=\"%s\", pod=~\"%s-[a-z0-9]+-[a-z0-9]+\"" .root.Release.Namespace .name }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "embedmesh.labels" .labels | nindent 4 }}
spec:
  scaleTargetRef:
    name: {{ .name }}
  minReplicaCount: {{ $scaling.minReplicas }}
  maxReplicaCount: {{ $scaling.maxReplicas }}
  {{- with $scaling.behavior }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- toYaml . | nindent 8 }}
  {{- end }}
  triggers:
    {{- if .queue }}
    - type: prometheus
      metadata:
        serverAddress: {{ $scaling.prometheusAddress }}
        query: sum(embedmesh_queue_cost_units{ {{- $pods -}} })
        threshold: {{ include "embedmesh.number" $scaling.queueCostUnits | quote }}
    {{- end }}
    - type: prometheus
      metadata:
        serverAddress: {{ $scaling.prometheusAddress }}
        query: sum(embedmesh_requests_in_flight{ {{- $pods -}} })
        threshold: {{ include "embedmesh.number" $scaling.requestsInFlight | quote }}
{{- end }}
{{- end }}

{{- define "embedmesh.disruption" -}}
{{- if .pod.maxUnavailable }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "embedmesh.labels" .labels | nindent 4 }}
spec:
  maxUnavailable: {{ .pod.maxUnavailable }}
  # A pod that never became ready must not stop the draining of its node.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "embedmesh.selector" .labels | nindent 6 }}
{{- end }}
{{- end }}

{{- /* Every impossible value, in one sentence each. */ -}}
{{- define "embedmesh.refuse" -}}
{{- $encoders := include "embedmesh.encoders" . | fromYaml -}}
{{- if not $encoders }}{{ fail "encoders: none is enabled, so there is nothing to serve: enable one, for example encoders.text.enabled=true." }}{{ end -}}
{{- if and .Values.redis.existingSecret.name .Values.valkey.enabled }}{{ fail "redis.existingSecret.name and valkey.enabled are both set, and a gateway has one cache: add valkey.enabled=false to use your Redis." }}{{ end -}}
{{- if and .Values.gateway.tls.clientCertificates (not .Values.gateway.tls.secretName) }}{{ fail "gateway.tls.clientCertificates asks clients for certificates, which needs TLS: set gateway.tls.secretName to a Secret with tls.crt, tls.key and ca.crt." }}{{ end -}}
{{- if and (not .Values.test.secretName) (or .Values.gateway.keys.secretName .Values.gateway.tls.clientCertificates) }}{{ fail "the gateway asks for keys or certificates, and `helm test` has none to show: set test.secretName to a Secret with token, tls.crt and tls.key, as far as they are asked for." }}{{ end -}}
{{- if ne (empty .Values.meshTls.gatewaySecretName) (empty .Values.meshTls.encoderSecretName) }}{{ fail "meshTls.gatewaySecretName and meshTls.encoderSecretName go together: gateways and encoders ask each other for certificates." }}{{ end -}}
{{- if and (dig "upstream_tls_name" "" .Values.gateway.settings) (not .Values.meshTls.encoderSecretName) }}{{ fail "gateway.settings.upstream_tls_name is the name in the encoders' certificates, and they have none: set meshTls." }}{{ end -}}
{{- range $name, $pod := merge (dict "gateway" .Values.gateway) $encoders -}}
{{- $scaling := $pod.autoscaling -}}
{{- $where := ternary "gateway" (printf "encoders.%s" $name) (eq $name "gateway") -}}
{{- if and (ne $scaling.kind "none") (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) }}{{ fail (printf "%s.autoscaling: minReplicas is %v and maxReplicas %v: fewest may not exceed most." $where $scaling.minReplicas $scaling.maxReplicas) }}{{ end -}}
{{- if and (eq $scaling.kind "keda") (not $scaling.prometheusAddress) }}{{ fail (printf "%s.autoscaling.kind is keda, which asks a Prometheus: set %s.autoscaling.prometheusAddress, for example to http://prometheus-operated.monitoring:9090." $where $where) }}{{ end -}}
{{- end -}}
{{- $ofModality := dict -}}
{{- range $name, $encoder := $encoders -}}
{{- $where := printf "encoders.%s" $name -}}
{{- if has $name (list "gateway" "valkey") }}{{ fail (printf "%s: the name is taken by the chart's own %s: choose another." $where $name) }}{{ end -}}
{{- if not (has $encoder.modality (list "text" "image" "audio")) }}{{ fail (printf "%s.modality is %q: set it to text, image or audio (an encoder that is called so needs no modality)." $where $encoder.modality) }}{{ end -}}
{{- if not (or $encoder.models.paths $encoder.models.folders) }}{{ fail (printf "%s.models.paths is empty: name the folder of at least one model, for example [/models/%s], or with %s.models.folders one of models." $where $encoder.modality $where) }}{{ end -}}
{{- if and (eq $encoder.models.from "pvc") (not $encoder.models.pvc.claimName) }}{{ fail (printf "%s.models.from is pvc: set %s.models.pvc.claimName to the claim that holds the models." $where $where) }}{{ end -}}
{{- if and (eq $encoder.models.from "init") (not (and $encoder.models.init.image $encoder.models.init.command)) }}{{ fail (printf "%s.models.from is init: set image and command of %s.models.init, which puts the models into %s." $where $where $encoder.models.mountPath) }}{{ end -}}
{{- if ne $encoder.models.from "image" -}}
{{- range concat (default list $encoder.models.paths) (default list $encoder.models.folders) }}{{ if not (hasPrefix (printf "%s/" $encoder.models.mountPath) (printf "%s/" .)) }}{{ fail (printf "%s.models: %s is not below %s, where the models' volume is mounted: correct the path or %s.models.mountPath." $where . $encoder.models.mountPath $where) }}{{ end }}{{ end -}}
{{- end -}}
{{- range $setting, $modality := dict "row_width" "text" "row_multiple" "text" "max_text_bytes" "text" "max_image_bytes" "image" "max_image_pixels" "image" "max_audio_bytes" "audio" "max_audio_seconds" "audio" -}}
{{- if and (hasKey $encoder.settings $setting) (ne $modality $encoder.modality) }}{{ fail (printf "%s.settings.%s is a setting of %s encoders, and this one is for %s: remove it." $where $setting $modality $encoder.modality) }}{{ end -}}
{{- end -}}
{{- $backend := dig "backend" "auto" $encoder.settings -}}
{{- $gpus := int $encoder.gpu.count -}}
{{- if and (has $backend (list "cuda" "tensorrt")) (not $gpus) }}{{ fail (printf "%s: backend %s needs a GPU: set %s.gpu.count=1, or another backend." $where $backend $where) }}{{ end -}}
{{- if and (has $backend (list "openvino" "onnxruntime" "fake" "triton")) $gpus }}{{ fail (printf "%s: backend %s uses no GPU of its pod, and %d would be reserved: set %s.gpu.count=0, or backend cuda, tensorrt or auto." $where $backend $gpus $where) }}{{ end -}}
{{- if and (dig "compile_cache" "" $encoder.settings) (not (hasPrefix "/tmp/" $encoder.settings.compile_cache)) }}{{ fail (printf "%s.settings.compile_cache: the root file system is read-only: set %s.compileCache.sizeLimit instead, which mounts a volume for it." $where $where) }}{{ end -}}
{{- if and (not $encoder.maxSurge) (not $encoder.maxUnavailable) }}{{ fail (printf "%s: maxSurge and maxUnavailable are both 0, so no upgrade could begin: set one of them to 1." $where) }}{{ end -}}
{{- $makes := dict "paths" $encoder.models.paths "backend" $backend "precision" (dig "precision" "model" $encoder.settings) "gpu" (gt $gpus 0) -}}
{{- with get $ofModality $encoder.modality -}}
{{- if ne (toJson .makes) (toJson $makes) }}{{ fail (printf "encoders.%s and %s are both for %s, and the gateway calls them in turns, so they must make the same vectors: give them the same models.paths, settings.backend and settings.precision, GPUs to all or none, or install a second release." .name $where $encoder.modality) }}{{ end -}}
{{- end -}}
{{- $_ := set $ofModality $encoder.modality (dict "name" $name "makes" $makes) -}}
{{- end -}}
{{- end }}
