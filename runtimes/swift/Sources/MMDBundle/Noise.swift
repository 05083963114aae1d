import Foundation

/// Noise from a seed: Philox4x32-10 (Salmon et al. 2011), Box-Muller in Double, rounded once to Float.
public enum Noise {
    /// Four words from a counter of four words and a key of two.
    public static func philox(_ counter: [UInt32], key: [UInt32]) -> [UInt32] {
        var c = counter
        var k = key
        for _ in 0..<10 {
            let p0 = UInt64(0xD251_1F53) * UInt64(c[0])
            let p1 = UInt64(0xCD9E_8D57) * UInt64(c[2])
            c = [
                UInt32(truncatingIfNeeded: p1 >> 32) ^ c[1] ^ k[0], UInt32(truncatingIfNeeded: p1),
                UInt32(truncatingIfNeeded: p0 >> 32) ^ c[3] ^ k[1], UInt32(truncatingIfNeeded: p0),
            ]
            k = [k[0] &+ 0x9E37_79B9, k[1] &+ 0xBB67_AE85]
        }
        return c
    }

    /// The first `count` values of one image: stream 0 is the initial noise, stream s + 1 that of the s-th noisy step.
    /// u(w) = (w + 0.5) / 2^32, r = sqrt(-2 ln u0), t = 2 pi u1: r cos t and r sin t.
    public static func normal(seed: UInt64, stream: UInt32, image: UInt32, count: Int) -> [Float] {
        let key = [UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32)]
        func uniform(_ word: UInt32) -> Double { (Double(word) + 0.5) * 0x1p-32 }
        var values: [Float] = []
        values.reserveCapacity(count + 3)
        for block in 0..<UInt32((count + 3) / 4) {
            let w = philox([block, stream, image, 0], key: key)
            for pair in [0, 2] {
                let r = (-2.0 * log(uniform(w[pair]))).squareRoot()
                let t = 2.0 * Double.pi * uniform(w[pair + 1])
                values.append(Float(r * cos(t)))
                values.append(Float(r * sin(t)))
            }
        }
        return Array(values.prefix(count))
    }
}
