// Texts, pictures and sounds beside each other: no modality may slow another one down.
import { embed, newAudio, newImage, newTexts, steady, thresholds } from './lib.js';

export const options = {
  scenarios: {
    text: { ...steady('5m'), exec: 'text' },
    image: { ...steady('5m'), exec: 'image' },
    audio: { ...steady('5m'), exec: 'audio' },
  },
  thresholds: {
    ...thresholds,
    // Also kept apart in the report.
    'grpc_req_duration{scenario:text}': thresholds.grpc_req_duration,
    'grpc_req_duration{scenario:image}': thresholds.grpc_req_duration,
    'grpc_req_duration{scenario:audio}': thresholds.grpc_req_duration,
  },
};

export function text() {
  embed(newTexts());
}

export function image() {
  embed([newImage()]);
}

export function audio() {
  embed([newAudio()]);
}
