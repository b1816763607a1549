package edgewright.android

import android.app.ActivityManager
import android.content.Context
import android.os.SharedMemory
import android.system.ErrnoException
import android.system.Os
import edgewright.Buffers
import edgewright.EdgewrightException
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.IdentityHashMap

/**
 * What the runtime must find before a model is opened. The fast path of GroupQueryAttention sizes its tiles by the level-2 cache that
 * the C library tells; Android's tells 0, the tiles become 1 x 1 (onnxruntime#33196), and the plain path is many times faster.
 */
internal fun prepareRuntime() = Os.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", "1", true)

/** Bytes that the system gives before it ends other apps. */
fun availableMemory(context: Context): Long {
    val info = ActivityManager.MemoryInfo()
    context.getSystemService(ActivityManager::class.java).getMemoryInfo(info)
    return info.availMem - info.threshold
}

/** Cores that are no slow ones, at most 4: slow cores hold the fast ones up, and more of them heat a phone until all are slow. */
fun fastCores(): Int {
    val speeds =
        (0 until Runtime.getRuntime().availableProcessors()).mapNotNull { core ->
            val file = File("/sys/devices/system/cpu/cpu$core/cpufreq/cpuinfo_max_freq")
            runCatching { file.readText().trim().toLong() }.getOrNull()
        }
    val slowest = speeds.minOrNull() ?: return 0
    val fast = speeds.count { it > slowest }
    return (if (fast == 0) speeds.size else fast).coerceAtMost(MOST_THREADS)
}

private const val MOST_THREADS = 4

/** States outside of the heap: a direct buffer of Android's lies on it, and the heap is small. */
internal class SharedBuffers : Buffers {
    private val regions = IdentityHashMap<ByteBuffer, SharedMemory>()

    @Synchronized
    override fun take(bytes: Int): ByteBuffer = try {
        val region = SharedMemory.create("edgewright", maxOf(1, bytes))
        val mapped = region.mapReadWrite()
        val buffer = mapped.order(ByteOrder.nativeOrder())
        regions[buffer] = region
        buffer
    } catch (error: ErrnoException) {
        throw EdgewrightException("$bytes bytes for a state are not to be had; ask for fewer new tokens, or close other apps", error)
    }

    @Synchronized
    override fun give(buffer: ByteBuffer) {
        SharedMemory.unmap(buffer)
        regions.remove(buffer)?.close()
    }
}
