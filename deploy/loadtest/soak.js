// Hours at RATE of all that callers do: hits and misses, every modality, calls and bulk streams. `make soak` runs it with a
// mesh of its own and watches the memory of every process; elsewhere the dashboard does.
import { INPUTS, RATE, embed, embedStream, newAudio, newImage, newTexts, popularTexts, steady, thresholds } from './lib.js';

// In hours a machine stands still for seconds, and that is no fault of the mesh: calls of ten seconds are waited for.
const patient = { maxVUs: Math.max(20, 10 * RATE) };

// So few that most are answered by a small cache.
const POPULAR = 1000;

export const options = {
  scenarios: {
    calls: { ...steady('2h'), ...patient, exec: 'calls' },
    // One stream for twenty calls.
    streams: { ...steady('2h'), ...patient, exec: 'streams', timeUnit: '20s' },
  },
  thresholds: {
    ...thresholds,
    // A run in which nothing was computed, nothing cached or nothing streamed shows nothing.
    cached_inputs: ['rate>0.05', 'rate<0.95'],
    stream_duration: ['p(99)<60000'],
    grpc_streams: ['count>0'],
  },
};

export function calls() {
  const dice = Math.random();
  if (dice < 0.6) embed(popularTexts(INPUTS, POPULAR));
  else if (dice < 0.9) embed(newTexts(1));
  else embed([...newTexts(1), newImage(), newAudio()]);
}

export function streams() {
  embedStream([newTexts(INPUTS), popularTexts(INPUTS, POPULAR), [newImage(), newAudio()], popularTexts(INPUTS, POPULAR)]);
}
