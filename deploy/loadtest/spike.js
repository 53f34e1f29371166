// Ten times RATE for a while: what is too much must be refused with the time to come back, nothing else may fail.
import { RATE, embed, newTexts, stages, thresholds } from './lib.js';

const calm = __ENV.DURATION || '1m';
const peak = __ENV.PEAK || '30s';

export const options = {
  scenarios: { spike: stages([[calm, RATE], ['1s', 10 * RATE], [peak, 10 * RATE], ['1s', RATE], [calm, RATE]]) },
  thresholds: {
    failed_calls: thresholds.failed_calls,
    failed_inputs: thresholds.failed_inputs,
    refused_calls: ['rate<0.9'],
  },
};

export default function () {
  embed(newTexts());
}
