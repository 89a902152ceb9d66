//! How often something took how long: plain numbers, in the shape that Prometheus' histograms have.

/// Counts by upper bound. A new one, and one by `default`, has seen nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One more than there are bounds.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// With these upper bounds, ascending, each of which belongs to its bucket.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    /// Takes one value.
    pub fn observe(&mut self, value: f64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
            self.sum += value;
        }
    }

    /// How many values there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// What they come to together.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// The upper bounds, the last infinite, each with how many values lie below it and above the one before.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_falls_in_the_first_bucket_that_is_not_below_it() {
        let mut histogram = Histogram::new(&[0.1, 1.0]);
        for value in [0.0, 0.1, 0.11, 1.0, 1.5, 1e9] {
            histogram.observe(value);
        }
        assert_eq!(histogram.buckets(), [(0.1, 2), (1.0, 2), (f64::INFINITY, 2)]);
        assert_eq!(histogram.count(), 6);
        assert!((histogram.sum() - 1_000_000_002.71).abs() < 1e-6);
    }
}
