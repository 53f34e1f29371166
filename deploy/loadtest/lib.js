// What the load tests share: calls, what is counted of them, thresholds. Knobs are environment variables:
//   ADDRESS   host:port of a gateway (localhost:50050)
//   RATE      calls a second in the steady part (20)
//   INPUTS    inputs a call (4)
//   DURATION  of the steady part; each script has its own default
//   P99_MS    p99 that is demanded, in milliseconds (500)
import { check } from 'k6';
import encoding from 'k6/encoding';
import exec from 'k6/execution';
import { Counter, Rate, Trend } from 'k6/metrics';
import grpc from 'k6/net/grpc';

export const RATE = Number(__ENV.RATE || 20);
export const INPUTS = Number(__ENV.INPUTS || 4);
const ADDRESS = __ENV.ADDRESS || 'localhost:50050';
const P99_MS = Number(__ENV.P99_MS || 500);

// Calls that failed, without those that were refused with the time to come back.
const failedCalls = new Rate('failed_calls');
const refusedCalls = new Rate('refused_calls');
const failedInputs = new Rate('failed_inputs');
const cachedInputs = new Rate('cached_inputs');
const vectors = new Counter('vectors');
// From the first chunk to the end of a stream, which k6 does not measure by itself.
const streamDuration = new Trend('stream_duration', true);

export const thresholds = {
  failed_calls: ['rate<0.001'],
  refused_calls: ['rate<0.001'],
  failed_inputs: ['rate<0.001'],
  grpc_req_duration: [`p(99)<${P99_MS}`],
  // A generator that cannot keep up measures itself.
  dropped_iterations: ['count<1'],
};

// An open loop: calls come when they come, whether or not earlier ones are answered.
export function steady(duration) {
  return {
    executor: 'constant-arrival-rate',
    rate: RATE,
    timeUnit: '1s',
    duration: __ENV.DURATION || duration,
    preAllocatedVUs: callers(RATE),
  };
}

export function stages(list) {
  const most = Math.max(...list.map(([, rate]) => rate));
  return {
    executor: 'ramping-arrival-rate',
    startRate: list[0][1],
    timeUnit: '1s',
    stages: list.map(([duration, rate]) => ({ duration, target: rate })),
    preAllocatedVUs: callers(most),
  };
}

// Enough for calls of two seconds.
function callers(rate) {
  return Math.min(2000, Math.max(10, Math.ceil(2 * rate)));
}

const client = new grpc.Client();
let connected = false;

function connect() {
  if (connected) return true;
  try {
    // The gateway describes its services itself.
    client.connect(ADDRESS, { plaintext: true, reflect: true, timeout: '10s', maxReceiveSize: 64 * 1024 * 1024 });
  } catch (error) {
    // Left alone it would end the iteration uncounted, and a run against nothing would pass.
    failedCalls.add(true);
    console.error(`${ADDRESS}: ${error}`);
    return false;
  }
  connected = true;
  return true;
}

export function embed(inputs, cache = 'CACHE_POLICY_READ_WRITE') {
  if (!connect()) return;
  const answer = client.invoke('embedmesh.v1.Gateway/Embed', { inputs, cache }, { timeout: '30s' });
  const refused = answer.status === grpc.StatusResourceExhausted;
  const ok = answer.status === grpc.StatusOK;
  refusedCalls.add(refused);
  failedCalls.add(!ok && !refused);
  if (!ok) {
    if (!refused) console.error(`${answer.status}: ${answer.error && answer.error.message}`);
    return;
  }
  count(answer.message.results, inputs.length);
}

// A stream of bulk work counts as one call: it fails when a chunk does, or when one stays without an answer.
export function embedStream(chunks) {
  if (!connect()) return;
  const started = Date.now();
  const open = new Map(chunks.map((inputs, sequence) => [String(sequence), inputs.length]));
  let failed = false;
  const fail = (reason) => {
    failed = true;
    console.error(`stream: ${reason}`);
  };
  const stream = new grpc.Stream(client, 'embedmesh.v1.Gateway/EmbedStream', { timeout: '60s' });
  stream.on('data', ({ sequence = '0', response, error }) => {
    if (!open.has(sequence)) fail(`an answer to chunk ${sequence} that nobody waits for`);
    if (error) fail(error.message);
    if (response) count(response.results, open.get(sequence));
    open.delete(sequence);
  });
  stream.on('error', (error) => fail(error.message));
  stream.on('end', () => {
    if (open.size) fail(`${open.size} chunks without an answer`);
    failedCalls.add(failed);
    streamDuration.add(Date.now() - started);
  });
  chunks.forEach((inputs, sequence) => {
    stream.write({ sequence, request: { inputs, cache: 'CACHE_POLICY_READ_WRITE', priority: 'PRIORITY_BULK' } });
  });
  stream.end();
}

function count(results, wanted) {
  check(results, { 'one result for each input': (found) => found.length === wanted });
  for (const result of results) {
    const good = Boolean(result.embedding);
    failedInputs.add(!good);
    if (good) {
      vectors.add(1);
      cachedInputs.add(Boolean(result.cached));
    }
  }
}

const WORDS = 'the of a river bank opens early when heavy rain falls on old stone walls and nobody looks up again'.split(' ');

// Never the same twice in a run, so that no cache helps; 5 to 60 words.
export function newTexts(count = INPUTS) {
  return Array.from({ length: count }, (_, i) => {
    const length = 5 + Math.floor(Math.random() ** 2 * 55);
    const words = Array.from({ length }, () => WORDS[Math.floor(Math.random() * WORDS.length)]);
    return { text: { text: `${exec.scenario.iterationInTest} ${i} ${Math.random()} ${words.join(' ')}` } };
  });
}

// A few are asked for most of the time: one call in five for the first hundredth of them, and so on.
export function popularTexts(count = INPUTS, known = 10000) {
  return Array.from({ length: count }, () => ({ text: { text: `question number ${Math.floor(known * Math.random() ** 3)}` } }));
}

// Uncompressed, made here: 32 x 32 pixels as BMP.
export function newImage() {
  const side = 32;
  const bytes = new Uint8Array(54 + 3 * side * side);
  const view = new DataView(bytes.buffer);
  bytes.set([0x42, 0x4d]);
  view.setUint32(2, bytes.length, true);
  view.setUint32(10, 54, true);
  view.setUint32(14, 40, true);
  view.setInt32(18, side, true);
  view.setInt32(22, side, true);
  view.setUint16(26, 1, true);
  view.setUint16(28, 24, true);
  for (let i = 54; i < bytes.length; i += 1) bytes[i] = Math.floor(Math.random() * 256);
  return { image: { content: encoding.b64encode(bytes.buffer) } };
}

// A second of a tone of some height, as samples.
export function newAudio() {
  const hertz = 16000;
  const samples = new Float32Array(hertz);
  const step = (2 * Math.PI * (200 + 2000 * Math.random())) / hertz;
  for (let i = 0; i < hertz; i += 1) samples[i] = 0.5 * Math.sin(step * i);
  const data = encoding.b64encode(samples.buffer);
  return { audio: { pcm: { samples: { dtype: 'DTYPE_FLOAT32', shape: [hertz], data }, sampleRateHz: hertz } } };
}
