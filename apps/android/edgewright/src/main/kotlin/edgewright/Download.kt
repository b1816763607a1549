package edgewright

import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.FlowCollector
import kotlinx.coroutines.flow.conflate
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.RandomAccessFile
import java.net.HttpURLConnection
import java.net.URL

/** Bytes that are here, of all that are fetched. */
data class Progress(val done: Long, val total: Long)

/** A part of a file, as it lies on the server: 2 GB at most. */
internal class Part(val name: String, val bytes: Long, val sha256: String)

internal class RemoteFile(val name: String, val parts: List<Part>) {
    val bytes = parts.sumOf { it.bytes }
}

/** `download.json`: what an app fetches, and where. */
class Download internal constructor(fields: Fields) {
    internal val base = fields.text("base")
    internal val files =
        fields.all("files").map { file ->
            RemoteFile(
                plain(file.text("name")),
                file.all("parts").map {
                    Part(plain(it.text("name")), it.long("bytes"), it.text("sha256"))
                },
            )
        }

    companion object {
        const val FILE = "download.json"

        fun read(file: File) = Download(JsonReader.fields(file))

        private fun plain(name: String) =
            if (Regex("[A-Za-z0-9_][A-Za-z0-9._-]{0,99}").matches(name)) name else fail("$FILE names no file: \"${name.take(40)}\"")
    }
}

/**
 * Fetches files to a folder. What was cut off is gone on with (HTTP Range), part by part; each part is hashed when it is whole, and
 * fetched anew where it is damaged. patience: milliseconds that a server may be silent.
 */
class Downloader(private val folder: File, private val download: Download, private val patience: Int = 30_000) {
    private val total = download.files.sumOf { it.bytes }

    /** Whether all files are here. */
    val whole get() = download.files.all { File(folder, it.name).length() == it.bytes }

    /** Throws EdgewrightException where something cannot be fetched; collect again to go on. */
    fun fetch(): Flow<Progress> = flow {
        folder.mkdirs()
        requireRoom()
        var done = 0L
        for (file in download.files) {
            if (File(folder, file.name).length() != file.bytes) fetch(file, done)
            done += file.bytes
            emit(Progress(done, total))
        }
    }.conflate().flowOn(Dispatchers.IO)

    private fun requireRoom() {
        val here = download.files.sumOf { maxOf(File(folder, it.name).length(), partial(it).length()) }
        val free = folder.usableSpace
        if (total - here > free) fail("the model takes ${(total - here) / MEGABYTE} MB more, ${free / MEGABYTE} MB are free; free some")
    }

    private fun partial(file: RemoteFile) = File(folder, "${file.name}.partial")

    /** The partial file is as long as what is here of it, so that its length says where to go on. */
    private suspend fun FlowCollector<Progress>.fetch(file: RemoteFile, before: Long) {
        val partial = partial(file)
        if (partial.length() > file.bytes) partial.delete()
        var begin = 0L
        for (part in file.parts) {
            val end = begin + part.bytes
            if (partial.length() < end) receive(part, partial, begin, before)
            requireWhole(part, partial, begin, end) // also of what was here before: an app may be ended before it was hashed
            begin = end
        }
        if (!partial.exists()) partial.createNewFile() // of no parts
        if (!partial.renameTo(File(folder, file.name))) fail("${File(folder, file.name)} cannot be written; look at the storage")
    }

    private suspend fun FlowCollector<Progress>.receive(part: Part, partial: File, begin: Long, before: Long) {
        val had = partial.length() - begin
        val connection =
            try {
                (URL(download.base + part.name).openConnection() as HttpURLConnection).apply {
                    connectTimeout = patience
                    readTimeout = patience
                    setRequestProperty("Accept-Encoding", "identity")
                    if (had > 0) setRequestProperty("Range", "bytes=$had-")
                    connect()
                }
            } catch (error: IOException) {
                throw cutOff(part, had, error)
            }
        try {
            val from = firstByte(connection, part, had)
            if (from != had) cut(partial, begin + from)
            FileOutputStream(partial, true).use { out ->
                readAll(connection.inputStream) { data, count ->
                    if (partial.length() + count > begin + part.bytes) {
                        cut(partial, begin)
                        fail("${part.name} is longer than the ${part.bytes} bytes that ${Download.FILE} says; upload it again")
                    }
                    out.write(data, 0, count)
                    emit(Progress(before + partial.length(), total))
                }
            }
        } catch (error: IOException) {
            throw cutOff(part, partial.length() - begin, error)
        } finally {
            connection.disconnect()
        }
    }

    /** Where in the part the answer begins: at what is missing, or at 0. */
    private fun firstByte(connection: HttpURLConnection, part: Part, had: Long): Long {
        val code = connection.responseCode
        return when {
            code == HttpURLConnection.HTTP_OK -> 0
            code == HttpURLConnection.HTTP_PARTIAL && connection.getHeaderField("Content-Range").orEmpty().startsWith("bytes $had-") -> had
            else -> fail("${part.name} cannot be fetched: the server says $code; look at the address ${download.base}")
        }
    }

    private fun requireWhole(part: Part, partial: File, begin: Long, end: Long) {
        if (partial.length() < end) throw cutOff(part, partial.length() - begin, null)
        val digest = sha256()
        partial.inputStream().use { input ->
            input.channel.position(begin)
            var left = part.bytes
            readAll(input) { data, count ->
                val own = minOf(left, count.toLong()).toInt()
                digest.update(data, 0, own)
                left -= own
                if (left == 0L) return@use
            }
        }
        if (digest.hex() != part.sha256) {
            cut(partial, begin)
            fail("${part.name} is damaged (its SHA-256 is not that of ${Download.FILE}); try again, or upload it again")
        }
    }

    private fun cut(partial: File, length: Long) = RandomAccessFile(partial, "rw").use { it.setLength(length) }

    private fun cutOff(part: Part, here: Long, cause: IOException?): EdgewrightException {
        val why = cause?.message?.let { " (${it.replace(Regex("\\s+"), " ").take(100)})" }.orEmpty()
        return EdgewrightException(
            "${part.name} has $here bytes of ${part.bytes}: the download was cut off$why; try again, it goes on from there",
            cause,
        )
    }

    private companion object {
        const val MEGABYTE = 1_000_000L
    }
}
